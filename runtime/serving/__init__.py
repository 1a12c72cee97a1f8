"""Many requests over one model: who runs next, what is reused, and what an answer must keep to."""
