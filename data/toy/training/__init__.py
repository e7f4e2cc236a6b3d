"""What trains the networks of the toy world other than its U-Net."""
