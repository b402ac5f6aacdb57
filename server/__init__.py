"""The server: OpenAI API, text, metrics and the command line. Async, never computes, never imports torch."""
