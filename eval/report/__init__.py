"""Tables, figures and pages made from kept answers."""
