"""Reading, changing and comparing GGUF files that may come from strangers."""
