"""What the preparing commands share."""
