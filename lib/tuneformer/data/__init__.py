"""Cells before they are tokens: where they come from, which of them are good enough, and which are tested."""
