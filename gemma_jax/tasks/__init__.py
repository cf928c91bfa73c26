"""Tasks that ask what a model remembers: seeded generators of texts, questions and answers, and scorers."""
