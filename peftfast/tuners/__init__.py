"""`BaseTuner`: a model with adapters below the task classes; one class a method that has something to add."""
