# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %%
"""Lab 3.10 as a notebook: the question, what to expect, the measurement, the comparison; every number from the result."""

from compresslab.course.lesson import Lesson

lesson = Lesson("3.10")
lesson.opening()

# %% before you run the next cell: say yes or no to each of these
lesson.expectations()

# %%
result = lesson.measure()

# %%
lesson.front(result, "perplexity", "document_similarity")

# %%
lesson.verdicts(result)

# %%
lesson.explanation()
