"""Make language models forget: unlearning with first- and second-order optimizers, on Ray."""
