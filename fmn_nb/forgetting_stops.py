"""Reasons to end a fine-tune early that a loss can't tell: what a judge sees in the images."""

from __future__ import annotations

from collections.abc import Callable

from fmn_nb.forgetting_settings import SettingsError
from fmn_nb.forgetting_steps import Callback, Progress


def periodic_judge(
    seen: Callable[[], float], *, every: int = 10, below: float = 0.05, callback: Callback | None = None
) -> Callback:
    """A callback for `forget` that asks a judge from time to time, and stops once it hardly sees the concept.

        judge = load_judge(folder)
        def seen():     # the pipeline is as trained so far
            found = judge.verdicts(generate(pipe, ["a photo of a cat"] * 8, range(8)))
            return sum(verdict.label == "cat" for verdict in found) / 8
        patch = forget(pipe, "cat", steps=200, callback=periodic_judge(seen, every=10, below=0.1))

    Args:
        seen: draws and judges: the share of images, in [0, 1], in which the concept is still to be seen.
        every: steps between two questions.
        below: the share under which to stop; `stopped_because` then tells both numbers and the step.
        callback: another callback, called in every step before the judge is asked.

    Raises:
        SettingsError: `every` below 1, or `below` outside (0, 1].
        ValueError: while the fine-tune runs, if `seen` gives no share.
    """
    if every < 1 or not 0 < below <= 1:
        raise SettingsError(f"a judge needs every >= 1 and 0 < below <= 1, not {every} and {below}")

    def ask(progress: Progress) -> str | None:
        said = callback(progress) if callback is not None else None
        if said or progress.step % every:
            return said
        share = float(seen())
        if not 0 <= share <= 1:
            raise ValueError(f"the judge must give a share from 0 to 1, not {share}")
        if share < below:
            return f"the judge saw the concept in {share:.3f} of the images after step {progress.step}, under {below:g}"
        return None

    return ask
