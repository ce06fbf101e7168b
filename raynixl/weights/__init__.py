"""Weight sync: trainers publish, rollouts subscribe, and each push flips every rollout at once to a whole version."""

from raynixl.weights.publication import Publication, publish
from raynixl.weights.report import PushReport
from raynixl.weights.subscription import Subscription, subscribe
from raynixl.weights.sync import WeightSync

__all__ = ["Publication", "PushReport", "Subscription", "WeightSync", "publish", "subscribe"]
