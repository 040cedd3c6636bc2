package raft

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
)

func TestElectionBasic(t *testing.T) {
	defer leaktest.CheckTimeout(t, 100*time.Millisecond)()
	synctest.Test(t, func(t *testing.T) {
		defer leaktest.CheckTimeout(t, 100*time.Millisecond)()
		h := NewHarness(t, 3)
		defer h.Shutdown()
		l, _ := h.CheckSingleLeader()
		h.SubmitToServer(l, []byte("a"))
		h.CheckCommittedN([]byte("a"), 3)
		h.CheckLogsMatch()
	})
}
