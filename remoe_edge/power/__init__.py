"""Power sensors, a thread that samples one, and energy from its samples."""
