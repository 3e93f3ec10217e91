"""From a trained model to an answer: export, verification, sessions. May import `models`."""
