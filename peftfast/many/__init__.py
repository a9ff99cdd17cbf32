"""Many adapters on one base: routing per row, routers, a pool with slots, combining, hot-swapping."""
