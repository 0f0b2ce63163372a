"""How good a result is: scores per case and label, runs compared case by case, folds with fewer labels."""
