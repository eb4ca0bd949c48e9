"""`python -m vkd_cache`, the same program as `vkd-cache`."""

from vkd_cache.cli import main

if __name__ == "__main__":  # worker processes import this module again
    main()
