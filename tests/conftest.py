"""What all tests rely on."""

import signal

# A job in the background of a shell ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
