"""Engine behind the scorer: vision features once per image, key/value states once per shared prefix."""
