"""A package of its own: torch-fidelity installs one called `tests` too, which would be found first."""
