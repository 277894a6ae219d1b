"""Running the course's notebooks with other parameters, and with their exercises solved, rightly and wrongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from fmn_nb.course.editions import solution
from fmn_nb.course.lessons import lessons_of
from fmn_nb.files import notebooks_dir

#: answers to each exercise that its check must refuse: what a reader may well try
WRONG = {
    "answer": ('draw("a photo of umbrella in the style of fluent", 3)', 'draw("a photo of an umbrella", 3)'),
    "rare": ("[]", "[*rare, next(s for s in range(20) if s not in rare)]", "rare[1:]"),
    "shares": ("[0.2, 0.3, 0.5]", "[0, 1 / 3, 2 / 3]"), "factor": ("1.0", "2.0"),
    "head": ("(head + 1) % layer.heads", "layer.heads"), "blind": ("image", "draw_without(list(text.words))"),
    "causal_map": ("taught_map", "lambda Q, K: taught_map(Q, K).tril()"),
    "photo": ("attention.mass(target) + 0.5", "100 * photo"),
    "early": ("whole + 0.1", "single.select(target, step=single.steps[half:])"),
    "crossed": ("(True, 0.5, 0.5)", "ground(first, masks[0][wanted[0]])"),
    "chosen": ("min(seen.layers, key=lambda name: mean_scores(layer=name)['iou'])", "list(seen.layers)"),
    "mean_square": ("0.5", "torch.cat([A[:, :, columns].flatten() for A in kept]).square().mean()"),
    "leak_closed": ("patch", "alone"), "loose": ("patch", "alone"), "both": ("patch", "second"),
    "two_means": ("(0.5, 0.5)", "(7 / 18, 7 / 18)"), "needed": ("30", "1000"),
    "strict_ua": ("1.5", "1 - strict_ua"), "weaker": ("report.after", "report.before"),
    "fair": ("(1, report.after)", "(50, report.before)"),
    "mean_change": ("0.4", "-0.3"),
    "in_input": ("score", "replace(in_input, seeds=in_input.seeds[:1])"),
    "from_word": ("fmn.LearnedTokens('<s>', (start,))", "learned"),
    "control": ("inverted['4 tokens']", "next(one for name, one in inverted.items() if name != '4 tokens')"),
    "paper_back": ("relearned", "relearned.iloc[:1]"),
    "sum_rank": ("8", "16"), "pressed": ("combined", "combined.low_rank(4)"),
    "weighted": ("tables['apart']", "weighted.iloc[:1]"),
    "reverse": ("tables['one after another']", "reverse.iloc[:0]"),
    "dominated": ("corrected", "corrected.scaled(0.5)"),
    "best": ('done["after.h"].idxmin()', 'done["forgetting.seconds"].idxmin()'),
    "cheap": ('done["forgetting.seconds"].idxmax()', 'done["after.h"].idxmin()'),
    "sure": ("[(rows[0].run, rows[0].run)]",
             "[(one.run, other.run) for one in ua for other in ua if one.value > other.value]"),
    "edit_rank": ("1", "said.shape[-1]"), "no_push": ("4.0", "0.0"),
    "confined": ("patches['uce']", "fmn.forget(bench, other, preset='uce', null_space=0.1)"),
    "other_text": ("share(A, pixels, list(range(length)))", "share(A, others, pixels)"),
    "unturned": ("A", "unturned.roll(1, -1)"),
    "leak_cut": ("judged(drawn['nothing']) | {'from': -1.0}", "judged(apart['neither']) | {'to': 2.0}"),
    "halfway": ("[one.rotate(90) for one in halfway]", "halfway[:1]"),
    "text_side": ("patches['balanced']", "patches['uce']"),
    "nested": ("(0, 0, 1, 1)", "(0.0, 0.0, 0.2, 0.3)"), "half_open": ("0.5", "1.0"),
    "crowd": ("laid_out(parse_interactions('cat=chasing=frog; cat=left of=fish'))",
              "[fmn.Interaction(a, 'above', b, (0, 0.6, 0.3, 0.9), (0, 0.1, 0.3, 0.4)) for a, b in "
              "(('cat', 'frog'), ('dog', 'fish'))]"),
    "by_neighbour": ("asked_by[presets[0]]",
                     "grounding_attack(session, concept, patches[presets[0]], each=2, how=how, synonym='a fat cat')"),
    "nothing_instead": ("patches['ca']", "patches['esd-x']"),
    "gentle": ("fused[len(wanted)]", "fmn.combine(apart)"),
    "sequel": ('{"notebooks": ["03"], "grid": {"seed": [0, 1, 2]}}', '{"notebooks": ["03"], "grid": {"seed": [7]}}'),
}


def run_notebook(number: str, folder: Path, parameters: dict,
                 change: Callable[[nbformat.NotebookNode], None] | None = None) -> nbformat.NotebookNode:
    """Execute a notebook of the course with other parameters; an error in a cell is raised."""
    [path] = notebooks_dir().glob(f"{number}_*.ipynb")
    return _execute(path, folder, parameters, change)


def run_solution(number: str, folder: Path, parameters: dict,
                 wrong: Mapping[str, Sequence[str]]) -> nbformat.NotebookNode:
    """Execute a notebook's solution edition; each check also meets wrong answers, and must refuse every one.

    `wrong`: the name that the reader assigns -> expressions.
    """
    [lesson] = lessons_of([number])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / lesson.path.name
    nbformat.write(solution(lesson), path)
    return _execute(path, folder, parameters, lambda notebook: _refuse(notebook, wrong))


def _execute(path: Path, folder: Path, parameters: dict,
             change: Callable[[nbformat.NotebookNode], None] | None) -> nbformat.NotebookNode:
    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
    if change is not None:
        change(notebook)
    return NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


def _refuse(notebook: nbformat.NotebookNode, wrong: Mapping[str, Sequence[str]]) -> None:
    """After each grading cell of an edition: wrong answers, each of which it must refuse."""
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            check = cell.source
            name = check.split()[1]  # "assert NAME is not None, ..."
            lines = [check, "from dataclasses import replace", f"_right = {name}"]
            for number, answer in enumerate(wrong[name]):
                lines += [f"{name} = _right", f"{name} = {answer}",
                          f"try:\n    exec({check!r})\nexcept AssertionError:\n    {name} = 'refused'",
                          f"assert {name} == 'refused', 'the check takes wrong answer {number}'"]
            cell.source = "\n".join([*lines, f"{name} = _right"])
