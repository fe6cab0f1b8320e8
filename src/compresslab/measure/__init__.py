"""Measuring: every number of a report, lab or benchmark comes from here, and from an artifact reloaded from disk.

A function here takes plain things (a model, tensors, strings, a folder) and gives report.schema.Measurement, or
intervals.Scored, which has `.measurement()` (with its 95 % interval) and `.minus(before)` (the paired difference).

Quality, each a list of Scored, unit by unit:
    perplexity.perplexity(model, windows)                        -> Scored
    perplexity.perplexity_by_position(model, windows, new_cache) -> [Scored]
    agreement.read(model, windows, against=..., record=...)      -> [Scored]  perplexity, KL, top-1 agreement, flips: one pass
    classification.scores(predicted, labels)                     -> [Scored]  accuracy, F1, precision, recall
    classification.agreement(reference, predicted, labels)       -> [Scored]  top-1 agreement, flips
    embedding.agreement(reference, found)                        -> [Scored]  cosine, correlation of similarities
    embedding.human_pairs(first, second, rated)                  -> [Scored]  Pearson, Spearman over pairs of texts
    embedding.human_documents(found, rated)                      -> [Scored]  the same over all pairs of documents
    writing.write(model, tokenizer, prompts)                     -> texts, for the next
    generation.bleu / chrf / rouge(hypotheses, references)       -> Scored or [Scored]
    harness.run(model, tokenizer, tasks)                         -> [Scored]  lm-evaluation-harness

Efficiency, each a list of Measurement:
    size.measure(folder)                                   disk_bytes and weight_bytes, as `du --apparent-size` counts
    size.cache_bytes(model, prompt, cache, nbytes)         kv_cache_bytes_per_token
    counts.parameters(model)                               parameters, nonzero_parameters
    counts.operations(model, inputs)                       macs, flops of one forward of that input
    speed.language_model_speed(model, prompt)              prefill_ms, decode_tokens_per_s
    speed.forward_speed(model, inputs)                     forward_ms
    sweep.forward(model, inputs_of, batches=..., lengths=..) p50, p95, p99 and throughput over batch and length
    speed.summary(name, values, unit, device, conditions)  any list of timed runs as one Measurement
    sweep.percentiles(name, times_ms, device, conditions)  p50, p95 and p99 of timed runs
    energy.of(call, items=..., unit=...)                   joules and grams of CO2 of a call, measured or marked an estimate
    environment.peak_memory_bytes()                        of this process
    fresh.measure(Job(...))                                any of this in a process of its own
"""
