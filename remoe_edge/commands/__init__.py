"""The commands of ``remoe-edge``, one module each; a module offers its click command as ``command``."""
