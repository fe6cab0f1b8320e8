# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %%
"""Lab 3.4 as a notebook: the question, what to expect, the measurement, the comparison; every number from the result."""

import os
from pathlib import Path

from IPython.display import HTML, Markdown, display

from compresslab.course import catalogue, experiment, showing

lab = catalogue.lab("3.4")
lang = os.environ.get("COMPRESSLAB_LANG", "en")
scale = os.environ.get("COMPRESSLAB_SCALE", "micro")
seeds = int(os.environ.get("COMPRESSLAB_SEEDS") or 0) or None


def tell(key):
    display(Markdown(lab.say(key, lang)))


# %%
display(Markdown(f"# {lab.number} {lab.say('title', lang)}"))
tell("question")
tell("background")

# %% before you run the next cell: say yes or no to each of these
display(Markdown("\n".join(f"- {lab.say(expected['key'], lang)}" for expected in lab.expected(scale))))

# %%
result = experiment.run("3.4", scale=scale, seeds=seeds)
result.save(Path("result.json"))
display(Markdown(showing.markdown(showing.measured(result, lang))))

# %%
display(HTML(showing.pareto(result, "perplexity", lab.say("perplexity", lang), lang)))

# %%
display(Markdown(showing.markdown(showing.verdicts(result, lang))))
display(Markdown(showing.markdown(showing.papers(result, lang))))

# %%
tell("explain")
