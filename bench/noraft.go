//go:build !raftdriver

package main

import "errors"

// newRaft stands in for the driver in raft.go where that is not compiled in.
func newRaft() (System, error) {
	return nil, errors.New("system \"raft\" is not in this build; build or run with -tags raftdriver")
}
