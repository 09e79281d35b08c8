"""An OpenAI-compatible server: llama-server, watched over, behind a front that keeps limits and tells metrics."""
