"""Train recipes over seeds and judge what they learned."""
