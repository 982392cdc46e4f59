"""The judgement: metrics and statistics."""
