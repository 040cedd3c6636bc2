package main

import (
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"time"

	"example.com/raft"
)

//go:embed page.html
var pageHTML []byte

// The page is one file and loads nothing; what it shows is data, never markup.
const pagePolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

const (
	shownKeys    = 50
	shownRecords = 80
	shownWindow  = 60 * time.Second
	silent       = 2 * time.Second // a follower that its leader has not heard for so long is not shown as one
)

// page serves the status page, what it shows, and what its buttons do.
type page struct {
	nodes   []*Node // of this process
	feed    *Feed
	self    *Node // whose port it is; nil on the port of the page alone
	control bool  // the buttons work
}

// newPage returns the handler of one port: the page, and the API of self.
func newPage(nodes []*Node, feed *Feed, self *Node, control bool) http.Handler {
	p := &page{nodes, feed, self, control}
	mux := http.NewServeMux()
	if self != nil {
		self.api().register(mux)
	}
	for _, n := range nodes {
		// The page writes through the node of the user's choice, but from its
		// own origin.
		sub := http.NewServeMux()
		n.api().register(sub)
		prefix := "/nodes/" + string(n.ID)
		mux.Handle(prefix+"/kv/", http.StripPrefix(prefix, sub))
	}
	mux.HandleFunc("GET /{$}", p.html)
	mux.HandleFunc("GET /status", p.status)
	if control {
		mux.HandleFunc("POST /nodes/{id}/{action}", p.act)
	}
	return mux
}

// api returns the node's API, which follows its restarts.
func (n *Node) api() *api { return &api{propose: n.propose, timeout: n.Timeout} }

func (p *page) html(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", pagePolicy)
	w.Header().Set("Cache-Control", "no-cache")
	w.Write(pageHTML)
}

// pageState is what /status answers.
type pageState struct {
	Now     int64                  `json:"now"` // milliseconds since 1970
	Window  int64                  `json:"window"`
	Self    raft.NodeID            `json:"self"` // whose port this is, "" if nobody's
	Control bool                   `json:"control"`
	Nodes   []nodeState            `json:"nodes"`
	Keys    []keyInfo              `json:"keys"`
	Total   int                    `json:"total"`  // keys, of which Keys are the newest
	Source  raft.NodeID            `json:"source"` // the node that holds Keys
	Records []record               `json:"records"`
	Spans   map[raft.NodeID][]span `json:"spans"`
}

// nodeState is one node as this process knows it.
type nodeState struct {
	ID      raft.NodeID   `json:"id"`
	Here    bool          `json:"here"` // it runs in this process; otherwise only Role, Leader, Match and Raft are set
	Running bool          `json:"running"`
	Cut     bool          `json:"cut"`
	Role    string        `json:"role"`
	Term    raft.Term     `json:"term"`
	Leader  raft.NodeID   `json:"leader"`
	Last    raft.Index    `json:"last"`
	Commit  raft.Index    `json:"commit"`
	Applied raft.Index    `json:"applied"`
	HTTP    string        `json:"http"`
	Raft    string        `json:"raft"`
	Missing []raft.NodeID `json:"missing"`
	Error   string        `json:"error"`
}

func (p *page) status(w http.ResponseWriter, r *http.Request) {
	state := pageState{Now: time.Now().UnixMilli(), Window: shownWindow.Milliseconds(), Control: p.control}
	if p.self != nil {
		state.Self = p.self.ID
	}
	state.Records, state.Spans = p.feed.recent(shownRecords, shownWindow)
	var source *Store
	var newest raft.Index
	for _, n := range p.nodes {
		server, store, running := n.current()
		if server == nil {
			continue
		}
		st := server.Status()
		state.Nodes = append(state.Nodes, n.state(st, running))
		// The keys shown are those of the running node that applied most.
		if running && (source == nil || st.Applied > newest) {
			source, newest, state.Source = store, st.Applied, n.ID
		}
		if !p.control {
			state.Nodes = append(state.Nodes, others(st)...)
		}
	}
	slices.SortFunc(state.Nodes, func(a, b nodeState) int { return cmp.Compare(a.ID, b.ID) })
	if source != nil {
		state.Keys, state.Total = source.newest(shownKeys)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(state)
}

func (n *Node) state(st raft.Status, running bool) nodeState {
	s := nodeState{
		ID: n.ID, Here: true, Running: running && st.Role != raft.Dead, Cut: n.gate.isCut(),
		Role: st.Role.String(), Term: st.Term, Leader: st.Leader,
		Last: st.Last, Commit: st.Commit, Applied: st.Applied,
		HTTP: n.HTTP, Raft: n.Listen, Missing: st.Missing,
	}
	if st.Err != nil {
		s.Error = st.Err.Error()
	}
	return s
}

// others is what a node of a cluster of processes knows of the other nodes: who
// leads, and, if it leads itself, how far they are.
func others(st raft.Status) []nodeState {
	var nodes []nodeState
	for _, m := range st.Members {
		if m.ID == st.ID {
			continue
		}
		n := nodeState{ID: m.ID, Raft: m.Addr}
		if m.ID == st.Leader {
			n.Role, n.Term = raft.Leader.String(), st.Term
		}
		for _, f := range st.Followers {
			if f.ID == m.ID && st.Role == raft.Leader {
				n.Last = f.Match
				if time.Since(f.LastContact) < silent {
					n.Role = raft.Follower.String()
				}
			}
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// act is a press of one of the page's buttons.
func (p *page) act(w http.ResponseWriter, r *http.Request) {
	var node *Node
	for _, n := range p.nodes {
		if string(n.ID) == r.PathValue("id") {
			node = n
		}
	}
	if node == nil {
		fail(w, http.StatusNotFound, "there is no node %q", r.PathValue("id"))
		return
	}
	var err error
	switch action := r.PathValue("action"); action {
	case "kill":
		err = node.Kill()
	case "restart":
		err = node.Start(r.Context())
	case "partition":
		node.SetPartitioned(true)
	case "heal":
		node.SetPartitioned(false)
	default:
		fail(w, http.StatusNotFound, "a node can't %q: use kill, restart, partition or heal", action)
		return
	}
	switch {
	case errors.Is(err, errRunning), errors.Is(err, errStopped):
		fail(w, http.StatusConflict, "%v", err)
	case err != nil:
		fail(w, http.StatusInternalServerError, "%v", err)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}
