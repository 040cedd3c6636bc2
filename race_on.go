//go:build race

package raft

// raceEnabled: invariants are checked after every step in race builds.
const raceEnabled = true
