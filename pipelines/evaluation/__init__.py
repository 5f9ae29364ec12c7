"""What a trained classifier is worth: its predictions, their calibration, when to trust them."""
