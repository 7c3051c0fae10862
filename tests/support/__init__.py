"""What the tests build on: tiny random models, and an independent definition of what they compute."""
