"""The judgement: metrics, baselines, comparisons, leakage."""
