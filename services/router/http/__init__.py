"""HTTP: the OpenAI API, health and metrics."""
