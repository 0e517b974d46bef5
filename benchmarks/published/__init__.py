"""What others measured, as questions to pipefit: records, what they ran, and how to run it."""
