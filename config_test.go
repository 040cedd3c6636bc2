package raft

import (
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"
)

type applyFunc func(Entry) []byte

func (f applyFunc) Apply(e Entry) []byte { return f(e) }

func discardLogger() *slog.Logger { return slog.New(slog.DiscardHandler) }

func goodConfig() Config {
	return Config{ID: "a", ClusterID: "c", StateMachine: applyFunc(func(Entry) []byte { return nil }), Storage: NewMemoryStorage()}
}

func TestConfigDefaultsAreValid(t *testing.T) {
	if err := goodConfig().Validate(); err != nil {
		t.Error(err)
	}
}

// One error names every bad field.
func TestConfigNamesEveryBadField(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := Config{
		Storage: NewMemoryStorage(), Dir: "both", Listener: l, Listen: "127.0.0.1:0",
		Bootstrap:         []Member{{ID: "x", Addr: "nowhere"}, {ID: "x", Addr: "h:1", Learner: true}},
		HeartbeatInterval: time.Microsecond, ElectionTimeout: time.Microsecond, DisableCheckQuorum: true,
		MaxCommandBytes: 1 << 30, MaxQueueBytes: -1, MaxUncommittedBytes: -1, MaxFrameBytes: -1,
		MaxInflightAppends: -1, MaxInflightBytes: -1, MaxLogMemoryBytes: -1, MaxSegmentBytes: 1,
	}
	_, err = Start(t.Context(), c)
	if err == nil {
		t.Fatal("started")
	}
	for _, field := range []string{"ID:", "ClusterID:", "StateMachine:", "Dir and Storage:", "Listen and Listener:",
		"Bootstrap[0].Addr:", "Bootstrap[1].ID:", "Bootstrap[1].Learner:", "Bootstrap: this node", "HeartbeatInterval:",
		"ElectionTimeout:", "DisableCheckQuorum:", "MaxCommandBytes:", "MaxQueueBytes:", "MaxUncommittedBytes:",
		"MaxFrameBytes:", "MaxInflightAppends:", "MaxInflightBytes:", "MaxLogMemoryBytes:", "MaxSegmentBytes:"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("the error does not name %s\n%v", field, err)
		}
	}
	if _, err := l.Accept(); err == nil {
		t.Error("a failing Start left its listener open")
	}
}

// The founding experiment's timing is refused to services, with the reason.
func TestConfigRefusesUnstableTiming(t *testing.T) {
	c := goodConfig()
	c.HeartbeatInterval, c.ElectionTimeout = 3*time.Second, 150*time.Millisecond
	err := c.Validate()
	if err == nil || !strings.Contains(err.Error(), "depose a healthy leader") {
		t.Errorf("got %v", err)
	}
	c.ElectionTimeout = 9 * time.Second
	if err := c.Validate(); err != nil {
		t.Errorf("three heartbeats in an election timeout are enough: %v", err)
	}
}
