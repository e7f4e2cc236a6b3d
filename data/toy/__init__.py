"""The toy world: a renderer of captioned images, and the small pretrained networks that go with it."""
