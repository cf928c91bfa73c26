"""Teaching: the loss, and a step of the optimiser through the memory."""
