"""Frozen networks and what is read from them: the real score, the few-step target sampler, feature taps."""
