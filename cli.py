#!/usr/bin/env python3
"""The command line from a checkout, without installing: `python cli.py train ...`, `torchrun cli.py train ...`."""

from vkd_cache.cli import main

if __name__ == "__main__":  # worker processes import this module again
    main()
