package raft

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

type applyFunc func(Entry) []byte

func (f applyFunc) Apply(e Entry) []byte { return f(e) }

func (applyFunc) Snapshot() (Capture, error) { return nil, errNoSnapshots }
func (applyFunc) Restore(io.Reader) error    { return errNoSnapshots }

// noSnapshots is embedded in state machines whose tests take none.
type noSnapshots struct{}

func (noSnapshots) Snapshot() (Capture, error) { return nil, errNoSnapshots }
func (noSnapshots) Restore(io.Reader) error    { return errNoSnapshots }

var errNoSnapshots = errors.New("this machine takes no snapshots")

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
		SessionTimeout: time.Millisecond, MaxSessions: -1, MaxSessionRequests: -1, MaxResultBytes: 1000, MaxSessionsBytes: 1000,
	}
	_, err = Start(t.Context(), c)
	if err == nil {
		t.Fatal("started")
	}
	for _, field := range []string{"ID:", "ClusterID:", "StateMachine:", "Dir and Storage:", "Listen and Listener:",
		"Bootstrap[0].Addr:", "Bootstrap[1].ID:", "Bootstrap[1].Learner:", "Bootstrap: this node", "HeartbeatInterval:",
		"ElectionTimeout:", "DisableCheckQuorum:", "MaxCommandBytes:", "MaxQueueBytes:", "MaxUncommittedBytes:",
		"MaxFrameBytes:", "MaxInflightAppends:", "MaxInflightBytes:", "MaxLogMemoryBytes:", "MaxSegmentBytes:",
		"SessionTimeout:", "MaxSessions:", "MaxSessionRequests:", "MaxSessionsBytes: 1000 is outside 1128"} {
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

// Each bad field is refused by its name.
func TestConfigBadFields(t *testing.T) {
	long := NodeID(strings.Repeat("x", 256))
	for _, test := range []struct {
		field string
		spoil func(c *Config)
	}{
		{"ID", func(c *Config) { c.ID = "" }},
		{"ID", func(c *Config) { c.ID = long }},
		{"ClusterID", func(c *Config) { c.ClusterID = "" }},
		{"ClusterID", func(c *Config) { c.ClusterID = string(long) }},
		{"StateMachine", func(c *Config) { c.StateMachine = nil }},
		{"Dir and Storage", func(c *Config) { c.Storage = nil }},
		{"Dir and Storage", func(c *Config) { c.Dir = "d" }},
		{"Listen and Listener", func(c *Config) { c.Listen, c.Listener = "h:1", &net.TCPListener{} }},
		{"Bootstrap", func(c *Config) { c.Bootstrap = []Member{{ID: "b", Addr: "h:1"}} }},
		{"Bootstrap[1].ID", func(c *Config) { c.Bootstrap = []Member{{ID: "a", Addr: "h:1"}, {ID: "a", Addr: "h:2"}} }},
		{"Bootstrap[1].ID", func(c *Config) { c.Bootstrap = []Member{{ID: "a", Addr: "h:1"}, {Addr: "h:2"}} }},
		{"Bootstrap[1].Addr", func(c *Config) { c.Bootstrap = []Member{{ID: "a", Addr: "h:1"}, {ID: "b", Addr: "h:1"}} }},
		{"Bootstrap[0].Addr", func(c *Config) { c.Bootstrap = []Member{{ID: "a", Addr: "nowhere"}} }},
		{"Bootstrap[0].Learner", func(c *Config) { c.Bootstrap = []Member{{ID: "a", Addr: "h:1", Learner: true}} }},
		{"HeartbeatInterval", func(c *Config) { c.HeartbeatInterval = -1 }},
		{"ElectionTimeout", func(c *Config) { c.ElectionTimeout = time.Microsecond }},
		{"ElectionTimeout", func(c *Config) { c.HeartbeatInterval, c.ElectionTimeout = 100*time.Millisecond, 299*time.Millisecond }},
		{"DisableCheckQuorum", func(c *Config) { c.DisableCheckQuorum = true }},
		{"MaxCommandBytes", func(c *Config) { c.MaxCommandBytes = -1 }},
		{"MaxCommandBytes", func(c *Config) { c.MaxCommandBytes = maxCommandBytesLimit + 1 }},
		{"MaxQueueBytes", func(c *Config) { c.MaxQueueBytes = 10 }},
		{"MaxUncommittedBytes", func(c *Config) { c.MaxUncommittedBytes = -1 }},
		{"MaxFrameBytes", func(c *Config) { c.MaxFrameBytes = -1 }},
		{"MaxInflightAppends", func(c *Config) { c.MaxInflightAppends = 100000 }},
		{"MaxInflightBytes", func(c *Config) { c.MaxInflightBytes = -1 }},
		{"MaxLogMemoryBytes", func(c *Config) { c.MaxLogMemoryBytes = -1 }},
		{"MaxSegmentBytes", func(c *Config) { c.MaxSegmentBytes = 4096 }},
		{"LeaseDuration", func(c *Config) { c.LeaseDuration = -1 }},
		{"LeaseDuration", func(c *Config) { c.LeaseDuration = 199 * time.Millisecond }},
		{"LeaseDuration", func(c *Config) { c.LeaseDuration = time.Second + 1 }},
		{"LeaseDuration", func(c *Config) { c.ElectionTimeout, c.LeaseDuration = time.Hour, time.Minute+1 }},
		{"LeaseDuration", func(c *Config) {
			c.LeaseDuration = time.Second
			c.sleptFor = func() (sleep, error) { return sleep{0, forever}, errors.New("no such clock") }
		}},
		{"LeaseDuration", func(c *Config) { c.LeaseDuration, c.DisableCheckQuorum, c.DisablePreVote = time.Second, true, true }},
		{"MaxClockDriftPercent", func(c *Config) { c.MaxClockDriftPercent = -1 }},
		{"MaxClockDriftPercent", func(c *Config) { c.MaxClockDriftPercent = 101 }},
	} {
		c := goodConfig()
		test.spoil(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "\n"+test.field+":") {
			t.Errorf("a bad %s: %v", test.field, err)
		} else if n := strings.Count(err.Error(), "\n"); n > 2 { // what depends on the field may be bad with it
			t.Errorf("a bad %s gives %d complaints: %v", test.field, n, err)
		}
	}
}
