"""What ails a stage: named diagnoses of its records, each with evidence, cause and remedy."""
