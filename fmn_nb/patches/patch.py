"""Patches: what a fine-tune produces. Apply one, scale it, combine several, and take it away again exactly.

A patch is a change of some of a denoiser's weights, W' = W + scale * D. It is kept either as LoRA factors,
D = B A (kind "lora"), or as the difference D itself (kind "weights"). Applying one puts new parameters in the
place of the changed ones and keeps the old ones aside, so removing it gives back the very same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fmn_nb.models import ORIGINALS, denoiser, denoiser_name, fingerprint
from fmn_nb.patches import files as patch_files
from fmn_nb.patches.files import PatchFileError
from fmn_nb.patches.learned_tokens import LearnedTokens

_APPLIED = "_fmn_applied"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


class PatchMismatchError(ValueError):
    """The patch was made for another base model, or doesn't fit this one."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of a denoiser's weights, with everything needed to know what it is.

    Attributes:
        kind: "lora" or "weights".
        tensors: for "lora" `MODULE.lora_A.weight` [rank, in] and `MODULE.lora_B.weight` [out, rank] (a
            convolution's A is [rank, in, height, width], its B [out, rank, 1, 1]); for "weights" the
            difference of each changed parameter under the parameter's own name.
        info: what `fmn.json` holds: concepts, preset, settings, seed, base (name, component, fingerprint),
            versions, forgetting (what the fine-tune reported), metrics. JSON values only.
        tokens: learned tokens, where a caller chose to ship them with the patch; else None.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    tokens: LearnedTokens | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "weights"):
            raise ValueError(f"a patch's kind is 'lora' or 'weights', not '{self.kind}'")
        if not self.tensors:
            raise ValueError("a patch without tensors changes nothing")
        bad = [name for name, tensor in self.tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise ValueError(f"NaN or infinite values in {bad[0]} and {len(bad) - 1} other tensors of the patch")

    def __repr__(self) -> str:
        names = ", ".join(str(dict(c).get("name")) for c in self.info.get("concepts", [])) or "nothing stated"
        return f"Patch(forgets {names}; {self.kind}, {len(self.tensors)} tensors, {self.nbytes / 1e6:.2f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def report(self) -> dict[str, Any]:
        """What the fine-tune reported (`info["forgetting"]`), without the lists that hold a number for every step."""
        return {name: value for name, value in self.info.get("forgetting", {}).items() if not isinstance(value, list)}

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, difference D in float32) of every changed parameter, at scale 1."""
        for name, tensor in self.tensors.items():
            if self.kind == "weights":
                yield name, tensor.float()
            elif name.endswith(LORA_A):
                module, down = name.removesuffix(LORA_A), tensor.float()
                up = self.tensors[module + LORA_B].float()
                yield f"{module}.weight", (up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])

    def changed(self) -> set[str]:
        """Names of the parameters that the patch changes."""
        if self.kind == "weights":
            return set(self.tensors)
        return {name.removesuffix(LORA_A) + ".weight" for name in self.tensors if name.endswith(LORA_A)}

    def save(self, folder: str | Path, *, half: bool = False, tokens: LearnedTokens | None = None) -> Path:
        """Write the patch to `folder`: its tensors and `fmn.json`. Each file is whole or as it was before.

        A LoRA becomes `pytorch_lora_weights.safetensors`, which plain `pipe.load_lora_weights(folder)` takes.

        Args:
            half: store the tensors as float16; `half_error` in `fmn.json` states what that loses, as a share of the
                norm of all tensors.
            tokens: learned tokens to ship beside the patch; by default none ever are, and those that an earlier patch
                shipped from this folder go.

        Raises:
            ValueError: a value is too large for float16, or `info` doesn't say the base model.
        """
        info = {name: value for name, value in self.info.items() if name != "tokens"}
        tensors = {name: tensor.half() if half else tensor for name, tensor in self.tensors.items()}
        if half:
            lost = sum(float((self.tensors[name].float() - near.float()).square().sum())
                       for name, near in tensors.items())
            whole = sum(float(tensor.float().square().sum()) for tensor in self.tensors.values())
            if not lost < float("inf"):
                raise ValueError("a value of the patch is too large for float16; save it without half=True")
            info["half_error"] = round((lost / max(whole, 1e-30)) ** 0.5, 6)
        return patch_files.write(Path(folder), self.kind, tensors, info, tokens)

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """Read a patch that `save` wrote.

        Raises:
            PatchFileError: a file is missing, truncated, changed since, or isn't a patch of this package.
        """
        kind, tensors, info = patch_files.read(Path(folder))
        try:
            tokens = LearnedTokens.load(folder) if info.pop("tokens", None) else None
            return cls(kind, tensors, info, tokens)
        except ValueError as error:
            raise PatchFileError(f"{folder}: {error}") from error

    @contextmanager
    def applied(self, pipe: DiffusionPipeline, scale: float = 1.0, *, force: bool = False) -> Iterator[None]:
        """Context in which `pipe` carries the patch, `scale` times (0 none, 1 as trained, beyond: stronger).

        Raises:
            PatchMismatchError: the patch was made for another base model (unless `force`), or doesn't fit.
        """
        self.apply(pipe, scale, force=force)
        try:
            yield
        finally:
            self.remove(pipe)

    def apply(self, pipe: DiffusionPipeline, scale: float = 1.0, *, force: bool = False) -> None:
        """Apply for good, until `remove`. Raises as `applied`; the pipeline is then left as it was."""
        self._check_fits(pipe, force)
        _rebuild(denoiser(pipe), [*applied_patches(pipe), (self, float(scale))], self.changed())

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the patch off again, exactly (bit for bit), whatever else is applied.

        Raises:
            ValueError: it isn't applied to this pipeline.
        """
        stack = applied_patches(pipe)
        places = [index for index, (patch, _) in enumerate(stack) if patch is self]
        if not places:
            raise ValueError(f"{self} is not applied to this pipeline, so it can't be removed from it")
        del stack[places[-1]]
        _rebuild(denoiser(pipe), stack, self.changed())

    def scaled(self, factor: float) -> Patch:
        """The same patch, `factor` times as strong (a LoRA's B is scaled, so it stays a LoRA)."""
        tensors = {name: tensor if self.kind == "lora" and name.endswith(LORA_A) else tensor * factor
                   for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, info={**self.info, "scale": self.info.get("scale", 1.0) * factor})

    def with_metrics(self, metrics: Mapping[str, Any]) -> Patch:
        """The same patch; its `fmn.json` says what was measured with it (`Report.to_metrics`). JSON values only."""
        return replace(self, info={**self.info, "metrics": dict(metrics)})

    def low_rank(self, rank: int) -> Patch:
        """The nearest LoRA patch of this rank (truncated singular value decomposition of every difference).

        Parameters that are no matrices or convolutions (biases, norms) can't be in a LoRA and are dropped.
        `info["low_rank_error"]` states ||D - B A||_F / ||D||_F over all parameters, dropped ones included.
        """
        tensors, lost, whole = {}, 0.0, 0.0
        for name, difference in self.differences():
            whole += float(difference.square().sum())
            if difference.ndim not in (2, 4) or not name.endswith(".weight"):
                lost += float(difference.square().sum())
                continue
            u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            module, kept = name.removesuffix(".weight"), min(rank, len(s))
            ones = (1,) * (difference.ndim - 2)
            tensors[module + LORA_A] = v[:kept].reshape(kept, *difference.shape[1:]).contiguous()
            tensors[module + LORA_B] = (u[:, :kept] * s[:kept]).reshape(-1, kept, *ones).contiguous()
            lost += float(s[kept:].square().sum())
        error = (lost / whole) ** 0.5 if whole else 0.0
        return Patch("lora", tensors, {**self.info, "low_rank_error": round(error, 6)}, self.tokens)

    def _check_fits(self, pipe: DiffusionPipeline, force: bool) -> None:
        """Refuse a wrong pipeline before anything is touched."""
        module, base = denoiser(pipe), self.info.get("base", {})
        component, here = base.get("component", denoiser_name(pipe)), denoiser_name(pipe)
        # These two first: they are quickly mended, and there is no right fingerprint without.
        if any(getattr(part, "fused_projections", False) for part in module.modules()):
            raise PatchMismatchError("projections are fused, so a patch would have no effect: unfuse_qkv_projections()")
        if away := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
            raise PatchMismatchError(f"{away[0]} is offloaded; load the pipeline on one device for a patch")
        if not force and "fingerprint" in base and (found := fingerprint(pipe)) != base["fingerprint"]:
            raise PatchMismatchError(
                f"the patch was made for the base model {base.get('name', '')} with fingerprint "
                f"{base['fingerprint']}, this one has {found}; load that model, or pass force=True to apply the patch "
                "all the same where its shapes fit")
        if component != here:
            raise PatchMismatchError(f"the patch changes a {component}, this pipeline has a {here}")
        names = dict(module.named_parameters())
        for name, difference in self.differences():
            found = names.get(_present_name(names, name))
            if found is None or found.shape != difference.shape:
                there = "no such parameter" if found is None else f"shape {tuple(found.shape)}"
                raise PatchMismatchError(f"the patch doesn't fit: {name} {tuple(difference.shape)}, here {there}")


def applied_patches(pipe: DiffusionPipeline) -> list[tuple[Patch, float]]:
    """(patch, scale) of every patch that `pipe` carries now, in the order of application."""
    return list(getattr(denoiser(pipe), _APPLIED, []))


def combine(patches: Sequence[Patch], weights: Sequence[float] | None = None) -> Patch:
    """One patch whose difference is the weighted sum of the given ones' (weights 1 by default).

    LoRAs stay a LoRA, exactly: the factors stand side by side, so the ranks add up.

    Raises:
        PatchMismatchError: they are not all for the same base model.
        ValueError: there is none, or the weights are not one each.
    """
    weights = [1.0] * len(patches) if weights is None else [float(weight) for weight in weights]
    if not patches or len(weights) != len(patches):
        raise ValueError(f"combine needs patches and one weight each, not {len(patches)} and {len(weights)}")
    bases = [patch.info.get("base", {}) for patch in patches]
    # Not by name, which is where a model was loaded from.
    if len({(base.get("component"), base.get("fingerprint")) for base in bases}) > 1:
        both = " and ".join(sorted({str(base.get("fingerprint")) for base in bases}))
        raise PatchMismatchError(f"patches for different base models can't be combined: {both}")
    together = [patch.scaled(weight) for patch, weight in zip(patches, weights, strict=True)]
    if all(patch.kind == "lora" for patch in patches):
        kind, names = "lora", dict.fromkeys(name for patch in together for name in patch.tensors)
        found = {name: [p.tensors[name].float() for p in together if name in p.tensors] for name in names}
        tensors = {name: torch.cat(parts, dim=0 if name.endswith(LORA_A) else 1) for name, parts in found.items()}
    else:
        kind, tensors = "weights", _summed(each for patch in together for each in patch.differences())
    parts = [{"weight": weight, **patch.info} for patch, weight in zip(patches, weights, strict=True)]
    concepts = [concept for patch in patches for concept in patch.info.get("concepts", [])]
    return Patch(kind, tensors, {"concepts": concepts, "base": bases[0], "combined": parts})


def _summed(differences: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameter name -> the sum of all its differences."""
    total: dict[str, Tensor] = {}
    for name, difference in differences:
        total[name] = total[name] + difference if name in total else difference
    return total


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` in the place of the one called `name` (dotted), without writing into the old one."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)


def _present_name(names: Mapping[str, Any], name: str) -> str:
    """The name under which a parameter stands now: peft wraps a layer and calls the original `base_layer`."""
    parent, _, leaf = name.rpartition(".")
    wrapped = f"{parent}.base_layer.{leaf}"
    return wrapped if name not in names and wrapped in names else name


def _rebuild(module: nn.Module, stack: list[tuple[Patch, float]], touched: set[str]) -> None:
    """Give the parameters in `touched` the values that the patches in `stack` ask for; all or none."""
    names = dict(module.named_parameters())
    originals: dict[str, nn.Parameter] = dict(getattr(module, ORIGINALS, {}))
    # At scale 0 the parameter itself comes back, not a sum that rounds to it.
    totals = _summed((name, scale * difference) for patch, scale in stack if scale
                     for name, difference in patch.differences() if name in touched)
    replacements: dict[str, nn.Parameter] = {}
    for name in touched:
        present = _present_name(names, name)
        now = names[present]
        original = originals.setdefault(present, now)
        if original.device != now.device or original.dtype != now.dtype:
            original.data = original.data.to(now)  # the pipeline was moved while patched
        if name in totals:
            value = (original.detach().float() + totals[name].to(original.device)).to(original.dtype)
            replacements[present] = nn.Parameter(value, requires_grad=original.requires_grad)
        else:
            replacements[present] = originals.pop(present)
    try:
        for present, parameter in replacements.items():
            set_parameter(module, present, parameter)
    except BaseException:
        for present in replacements:
            set_parameter(module, present, names[present])
        raise
    setattr(module, ORIGINALS, originals)
    setattr(module, _APPLIED, stack)
