"""What a running server or benchmark does now, for a terminal."""
