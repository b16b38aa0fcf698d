"""Models as folders with a card, as the hub holds them."""
