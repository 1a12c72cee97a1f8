"""An HTTP server with the endpoints that OpenAI clients call. Needs the extra ``serve``."""
