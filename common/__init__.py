"""Parts that the services share; each folder is one part, arrows go one way."""
