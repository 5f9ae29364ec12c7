"""An ensemble of small models -> how much it disagrees about each sample."""
