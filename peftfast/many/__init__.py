"""Many adapters on one base: routers, a pool with slots, combining, hot-swapping."""
