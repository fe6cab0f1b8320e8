"""What the cells of a lab's notebook show: its texts, and tables and figures of the result it measures.

A Lesson reads language, scale and number of seeds from the environment, where notebook.py puts them; each lab.py is its story in
cells, one call each.
"""

from __future__ import annotations

import os
from pathlib import Path

from IPython.display import HTML, Markdown, display

from compresslab.course import catalogue, experiment, showing
from compresslab.course.experiment import Result


class Lesson:
    """One lab in a notebook, in one language and at one scale."""

    def __init__(self, number: str) -> None:
        self.lab = catalogue.lab(number)
        self.lang = os.environ.get("COMPRESSLAB_LANG", "en")
        self.scale = os.environ.get("COMPRESSLAB_SCALE", "micro")
        self.seeds = int(os.environ.get("COMPRESSLAB_SEEDS") or 0) or None

    def opening(self) -> None:
        """Title, question and background."""
        display(Markdown(f"# {self.lab.number} {self.lab.say('title', self.lang)}"))
        self._tell("question")
        self._tell("background")

    def expectations(self) -> None:
        """The claims to say yes or no to before the measurement."""
        expected = self.lab.expected(self.scale)
        display(Markdown("\n".join(f"- {self.lab.say(one['key'], self.lang)}" for one in expected)))

    def measure(self) -> Result:
        """Run the lab, keep the result beside the notebook, show its rows."""
        result = experiment.run(self.lab.number, scale=self.scale, seeds=self.seeds)
        result.save(Path("result.json"))
        for lines in showing.tables(result, self.lang):
            display(Markdown(showing.markdown(lines)))
        return result

    def front(self, result: Result, *metrics: str) -> None:
        """The rows as points, quality by the first of `metrics` that they have against bytes."""
        measured = result.rows[next(iter(result.rows))]
        metric = next(one for one in metrics if one in measured)
        display(HTML(showing.pareto(result, metric, self.lab.say(metric, self.lang), self.lang)))

    def verdicts(self, result: Result) -> None:
        """What became of the expectations, and the paper's numbers beside ours."""
        display(Markdown(showing.markdown(showing.verdicts(result, self.lang))))
        display(Markdown(showing.markdown(showing.papers(result, self.lang))))

    def explanation(self) -> None:
        self._tell("explain")

    def _tell(self, key: str) -> None:
        display(Markdown(self.lab.say(key, self.lang)))
