"""Patches: what a fine-tune produces. Apply one, scale it, combine several, and remove it again exactly.

A patch is a change of some of a denoiser's weights, W' = W + scale * D. It is kept either as LoRA factors,
D = B A (kind "lora"), or as the difference D itself (kind "weights"). Applying one replaces the changed parameters by
new ones and keeps the old ones aside, so removing it restores the very same tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fmn_nb.models import ORIGINALS, Kept, denoiser, denoiser_name, digest, fingerprint, is_base, own_parameters
from fmn_nb.models.arguments import finite_number, whole_number
from fmn_nb.patches import files as patch_files
from fmn_nb.patches.files import PatchFileError
from fmn_nb.patches.learned_tokens import LearnedTokens, token_file
from fmn_nb.patches.standing import (
    ChangedWeightsError,
    check_reachable,
    fused_adapters,
    is_fused,
    patched,
    value_before,
)

_APPLIED = "_fmn_applied"
_SHOWN = 5  # names of concepts in one line
LORA_A, LORA_B, LORA_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"


class PatchMismatchError(ValueError):
    """The patch was made for another base model, or doesn't fit this one."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of a denoiser's weights, with a full description of what it is.

    Attributes:
        kind: "lora" or "weights".
        tensors: for "lora" `MODULE.lora_A.weight` [rank, in] and `MODULE.lora_B.weight` [out, rank] (a
            convolution's A is [rank, in, height, width], its B [out, rank, 1, 1]), and, if the layer's bias changes,
            `MODULE.lora_B.bias` [out]; for "weights" the difference of each changed parameter under the parameter's
            own name.
        info: what `fmn.json` holds: concepts, preset, settings, seed, base (name, component, fingerprint),
            versions, forgetting (what the fine-tune reported), metrics. JSON values only.
        tokens: learned tokens, if a caller chose to ship them with the patch; otherwise None.
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

    def __deepcopy__(self, _: dict[int, Any]) -> Patch:
        """The patch itself, which never changes, so it can be removed from a copy of a pipeline that carries it."""
        return self

    def __repr__(self) -> str:
        names = self._concepts()
        few = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        return (f"Patch(forgets {few or 'nothing stated'}; {self.kind}, {len(self.tensors)} tensors, "
                f"{self.nbytes / 1e6:.2f} MB)")

    def _repr_html_(self) -> str:
        """What a notebook shows: a small table."""
        base = self.info.get("base")
        base = base if isinstance(base, Mapping) else {}
        rows = {"forgets": ", ".join(self._concepts()) or "nothing stated",
                "preset": str(self.info.get("preset", "")) or "none stated",
                "kind": f"{self.kind}, {len(self.tensors)} tensors", "size": f"{self.nbytes / 1e6:.2f} MB",
                "base": f"{base.get('name') or 'not stated'} ({base.get('component', '')})".replace(" ()", "")}
        cells = "".join(f'<tr><th scope="row" style="text-align: left">{name}</th><td style="text-align: left">'
                        f"{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table><tbody>{cells}</tbody></table>"

    def _concepts(self) -> list[str]:
        """The names of what the patch forgets, each cut to a line's length."""
        said = self.info.get("concepts") or []
        return [shorten(str(one.get("name") if isinstance(one, Mapping) else one), 60) for one in said]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def report(self) -> dict[str, Any]:
        """What the fine-tune reported (`info["forgetting"]`), without the lists with a number for every step."""
        said = self.info.get("forgetting") or {}
        return {name: value for name, value in said.items() if not isinstance(value, list)}

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, difference D in float32) of every changed parameter, at scale 1."""
        for name, tensor in self.tensors.items():
            if self.kind == "weights":
                yield name, tensor.float()
            elif name.endswith(LORA_A):
                module, down = name.removesuffix(LORA_A), tensor.float()
                up = self.tensors[module + LORA_B].float()
                yield f"{module}.weight", (up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])
            elif name.endswith(LORA_BIAS):
                yield f"{name.removesuffix(LORA_BIAS)}.bias", tensor.float()

    def changed(self) -> set[str]:
        """Names of the parameters that the patch changes."""
        if self.kind == "weights":
            return set(self.tensors)
        weights = {name.removesuffix(LORA_A) + ".weight" for name in self.tensors if name.endswith(LORA_A)}
        return weights | {name.removesuffix(LORA_BIAS) + ".bias" for name in self.tensors if name.endswith(LORA_BIAS)}

    def save(self, folder: str | Path, *, half: bool = False, tokens: LearnedTokens | None = None,
             layout: str = "diffusers") -> Path:
        """Write the patch to `folder`: its tensors and `fmn.json`. Each file is whole or as it was before.

        A LoRA becomes `pytorch_lora_weights.safetensors`, which plain `pipe.load_lora_weights(folder)` takes.

        Args:
            half: store the tensors as float16; `half_error` in `fmn.json` states what that loses, as a share of the
                norm of all tensors.
            tokens: learned tokens to ship with the patch; none by default, and then an earlier patch's tokens are
                removed from the folder.
            layout: the naming in a LoRA's file: "diffusers", or "kohya" for AUTOMATIC1111, ComfyUI and others.

        Raises:
            ValueError: a value is too large for float16, `info` doesn't say the base model, `folder` is a file, or the
                layout can't hold the patch.
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
        return patch_files.write(Path(folder), self.kind, tensors, info, tokens, layout)

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """Read a patch that `save` wrote.

        Raises:
            PatchFileError: a file is missing, truncated, changed since, or isn't a patch of this package.
        """
        kind, tensors, info = patch_files.read(Path(folder))
        try:
            tokens = LearnedTokens.load(token_file(folder)) if info.pop("tokens", None) else None
            return cls(kind, tensors, info, tokens)
        except ValueError as error:
            raise PatchFileError(f"{folder}: {error}") from error

    @contextmanager
    def applied(self, pipe: DiffusionPipeline, scale: float = 1.0, *, force: bool = False) -> Iterator[None]:
        """Context in which `pipe` carries the patch, `scale` times (0: none, 1: as trained, more: stronger).

        Raises:
            PatchMismatchError: the patch was made for another base model (unless `force`), or doesn't fit.
        """
        self.apply(pipe, scale, force=force)
        changed = denoiser(pipe)
        try:
            yield
        finally:
            if denoiser(pipe) is not changed and any(patch is self for patch, _ in applied_patches(pipe)):
                self.remove(pipe)  # from a copy that took its place
            self.take_off(changed)

    def apply(self, pipe: DiffusionPipeline, scale: float = 1.0, *, force: bool = False) -> None:
        """Apply the patch until `remove`. Raises what `applied` raises; the pipeline is then left as it was."""
        scale = finite_number("scale", scale)
        self.check_fits(pipe, force)
        self.put_on(denoiser(pipe), scale)

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Remove the patch again, exactly (bit for bit), whatever else is applied.

        Raises:
            ValueError: it isn't applied to this pipeline.
            ChangedWeightsError: something else changed patched weights; nothing is touched then.
        """
        self.take_off(denoiser(pipe))

    def put_on(self, module: nn.Module, scale: float = 1.0) -> None:
        """`apply` to a network whose parameters have the patch's names and shapes (`check_shapes`)."""
        _rebuild(module, [*getattr(module, _APPLIED, []), (self, scale)], self.changed())

    def take_off(self, module: nn.Module) -> float:
        """`remove` from a network; returns the scale that the patch had there."""
        stack = list(getattr(module, _APPLIED, []))
        places = [index for index, (patch, _) in enumerate(stack) if patch is self]
        if not places:
            raise ValueError(f"{self} is not applied to this pipeline, so it can't be removed from it")
        _, scale = stack.pop(places[-1])
        _rebuild(module, stack, self.changed())
        return scale

    def scaled(self, factor: float) -> Patch:
        """The same patch, `factor` times as strong, in float32 (a LoRA's B is scaled, so it stays a LoRA)."""
        factor = finite_number("factor", factor)
        tensors = {name: tensor if self.kind == "lora" and name.endswith(LORA_A) else tensor.float() * factor
                   for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, info={**self.info, "scale": self.info.get("scale", 1.0) * factor})

    def with_metrics(self, metrics: Mapping[str, Any]) -> Patch:
        """The same patch, whose `fmn.json` says what was measured with it (`Report.to_metrics`); JSON values only."""
        return replace(self, info={**self.info, "metrics": dict(metrics)})

    def low_rank(self, rank: int, *, biases: bool = True) -> Patch:
        """The nearest LoRA patch of this rank (truncated singular value decomposition of every difference).

        A layer's bias is kept as it is beside its factors, unless `biases` is False. Other parameters that are no
        matrices or convolutions (norms) can't be in a LoRA and are dropped. `info["low_rank_error"]` states
        ||D - B A||_F / ||D||_F over all parameters, dropped ones included.

        Raises:
            ValueError: the rank isn't a whole number from 1, or nothing is left.
        """
        rank = whole_number("rank", rank, 1)
        differences, tensors, lost, whole = dict(self.differences()), {}, 0.0, 0.0
        matrices = {name.removesuffix(".weight") for name, difference in differences.items()
                    if difference.ndim in (2, 4) and name.endswith(".weight")}
        for name, difference in differences.items():
            whole += float(difference.square().sum())
            module, _, leaf = name.rpartition(".")
            if module not in matrices or leaf not in ("weight", "bias") or (leaf == "bias" and not biases):
                lost += float(difference.square().sum())
                continue
            if leaf == "bias":
                tensors[module + LORA_BIAS] = difference.contiguous()
                continue
            u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            kept, ones = min(rank, len(s)), (1,) * (difference.ndim - 2)
            tensors[module + LORA_A] = v[:kept].reshape(kept, *difference.shape[1:]).contiguous()
            tensors[module + LORA_B] = (u[:, :kept] * s[:kept]).reshape(-1, kept, *ones).contiguous()
            lost += float(s[kept:].square().sum())
        if not tensors:
            raise ValueError("the patch changes no matrix or convolution, so there is no LoRA of it")
        error = (lost / whole) ** 0.5 if whole else 0.0
        return Patch("lora", tensors, {**self.info, "low_rank_error": round(error, 6)}, self.tokens)

    def check_fits(self, pipe: DiffusionPipeline, force: bool) -> None:
        """Refuse a wrong pipeline before anything is touched."""
        module, base = denoiser(pipe), self.info.get("base", {})
        component, here = base.get("component", denoiser_name(pipe)), denoiser_name(pipe)
        # These two first: they are quickly fixed, and until then the fingerprint is wrong.
        if is_fused(module):
            raise PatchMismatchError("projections are fused, so a patch would have no effect: unfuse_qkv_projections()")
        if away := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
            raise PatchMismatchError(f"{away[0]} is offloaded; load the pipeline on one device for a patch")
        if not force and "fingerprint" in base and not is_base(pipe, base):
            dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
            older = "" if "signs" in base or dtype in ("float32", "float16") else (
                f" in float32 (an older patch can't tell it in {dtype})")
            raise PatchMismatchError(
                f"the patch was made for the base model {base.get('name', '')} with fingerprint "
                f"{base['fingerprint']}, this one has {fingerprint(pipe)}; load that model{older}, or pass force=True "
                "to apply the patch anyway if its shapes fit")
        if component != here:
            raise PatchMismatchError(f"the patch changes a {component}, this pipeline has a {here}")
        self.check_shapes(module)

    def check_shapes(self, module: nn.Module, part: str = "") -> None:
        """Raise a PatchMismatchError unless the network has all the parameters, in their shapes."""
        own = own_parameters(module)
        for name, difference in self.differences():
            _, found = own.get(name, ("", None))
            if found is None or found.shape != difference.shape:
                there = "no such parameter" if found is None else f"shape {tuple(found.shape)}"
                raise PatchMismatchError(f"the patch doesn't fit: {part}{name} {tuple(difference.shape)}, here {there}")


def applied_patches(pipe: DiffusionPipeline) -> list[tuple[Patch, float]]:
    """(patch, scale) of every patch that `pipe` carries now, in the order of application."""
    return list(getattr(denoiser(pipe), _APPLIED, []))


def combine(patches: Sequence[Patch], weights: Sequence[float] | None = None) -> Patch:
    """One patch whose difference is the weighted sum of the given ones' (weights 1 by default).

    LoRAs stay a LoRA, exactly: the factors stand side by side, so the ranks add up.

    Raises:
        PatchMismatchError: they are not all for the same base model.
        ValueError: there are no patches, or not one weight for each.
    """
    if isinstance(patches, Patch) or not all(isinstance(patch, Patch) for patch in patches):
        raise ValueError("combine takes a list of patches, combine([one, other]); a folder is read by Patch.load")
    weights = [1.0] * len(patches) if weights is None else [finite_number("a weight", one) for one in weights]
    if not patches or len(weights) != len(patches):
        raise ValueError(f"combine needs patches and one weight each, not {len(patches)} and {len(weights)}")
    bases = [patch.info.get("base", {}) for patch in patches]
    # Not by name, which is where a model was loaded from.
    if not all(_same_base(bases[0], base) for base in bases[1:]):
        both = " and ".join(sorted({str(base.get("fingerprint")) for base in bases}))
        raise PatchMismatchError(f"patches for different base models can't be combined: {both}")
    together = [patch.scaled(weight) for patch, weight in zip(patches, weights, strict=True)]
    if all(patch.kind == "lora" for patch in patches):
        kind, names = "lora", dict.fromkeys(name for patch in together for name in patch.tensors)
        found = {name: [p.tensors[name].float() for p in together if name in p.tensors] for name in names}
        tensors = {name: sum(parts[1:], parts[0]) if name.endswith(LORA_BIAS)
                   else torch.cat(parts, dim=0 if name.endswith(LORA_A) else 1) for name, parts in found.items()}
    else:
        kind, tensors = "weights", _summed(each for patch in together for each in patch.differences())
    parts = [{"weight": weight, **patch.info} for patch, weight in zip(patches, weights, strict=True)]
    concepts = [concept for patch in patches for concept in patch.info.get("concepts", [])]
    return Patch(kind, tensors, {"concepts": concepts, "base": bases[0], "combined": parts})


def _same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two patches are for one denoiser, whatever its precision (see `base_of`)."""
    if one.get("component") != other.get("component"):
        return False
    if any(one.get(key) == other.get(key) and one.get(key) for key in ("fingerprint", "denoiser")):
        return True
    coarse = one.get("coarse") or other.get("coarse")
    return one.get("fingerprint") == other.get("fingerprint") or bool(
        coarse and one.get("signs") and one.get("signs") == other.get("signs"))


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


@torch.inference_mode(False)  # what is made in inference mode could never be trained afterwards
def _rebuild(module: nn.Module, stack: list[tuple[Patch, float]], touched: set[str]) -> None:
    """Give the parameters in `touched` the values that the patches in `stack` ask for; all or none.

    Raises:
        ChangedWeightsError: something else changed one of them, so its original value is lost.
    """
    own, kept = own_parameters(module), dict(getattr(module, ORIGINALS, {}))
    check_reachable(module, own, touched)
    before = _values_before(module, own, {name: kept[name] for name in touched if name in kept})
    totals = _totals(stack, touched)
    replacements: dict[str, nn.Parameter] = {}
    for name in touched:
        present, now = own[name]
        original = kept[name].original if name in kept else now
        if name in totals:
            value = patched(before.get(name, original.detach()), totals[name])
            if not torch.isfinite(value.float()).all():
                raise ValueError(f"{name} would become infinite or NaN with the patch; take a smaller scale")
            replacements[present] = nn.Parameter(value, requires_grad=original.requires_grad)
            kept[name] = Kept(original, digest([value]), fused_adapters(module, present))
        else:
            replacements[present] = original
            kept.pop(name, None)
    there = {own[name][0]: own[name][1] for name in touched}
    try:
        for present, parameter in replacements.items():
            set_parameter(module, present, parameter)
    except BaseException:
        for present in replacements:
            set_parameter(module, present, there[present])
        raise
    for name, value in before.items():  # where it was moved, cast or fused into while patched
        original = getattr(module, ORIGINALS)[name].original
        if original.data_ptr() != value.data_ptr():
            original.data = value
    setattr(module, ORIGINALS, kept)
    setattr(module, _APPLIED, stack)


def _totals(stack: Iterable[tuple[Patch, float]], names: Collection[str]) -> dict[str, Tensor]:
    """Parameter name -> what the patches in `stack` add to it. At scale 0 it is nothing, not a sum that rounds to 0."""
    return _summed((name, scale * difference) for patch, scale in stack if scale
                   for name, difference in patch.differences() if name in names)


def _values_before(module: nn.Module, own: Mapping[str, tuple[str, nn.Parameter]],
                   kept: Mapping[str, Kept]) -> dict[str, Tensor]:
    """The originals' values as they would be now without a patch, where the module is now; see `value_before`."""
    changed = {name for name, one in kept.items() if digest([own[name][1]]) != one.put}
    there = _totals(getattr(module, _APPLIED, []), changed)
    values = {name: value_before(module, *own[name], one, there[name]) if name in changed
              else one.original.detach().to(own[name][1].device) for name, one in kept.items()}
    if lost := sorted(name for name, value in values.items() if value is None):
        raise ChangedWeightsError(
            f"something else changed {lost[0]} and {len(lost) - 1} other weights while they were patched (a LoRA fused "
            "in, a training, weights loaded), so the patch can't be removed exactly; nothing was touched: undo that "
            "change first (unfuse_lora()), or load the model anew")
    return values
