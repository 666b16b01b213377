"""Human judgements of answers: questionnaires, agreement, win rates and safety."""
