"""The definitions, in plain torch: what every kernel is tested against, and what runs without one."""
